"""Paper 2's tools: take motion blur off photographs, export generators, make blurred pairs, judge any method's output."""
