"""Execution plans: graphs of real models, rules that split them, what a plan costs, and the best plan there is."""
