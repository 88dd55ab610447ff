"""Plans run for real: torch's own engines (DTensor, DDP, FSDP2, pipelining) set up as a plan says, checked and timed."""
