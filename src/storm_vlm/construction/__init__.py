"""Training data as in section 3.2 of the paper: keyframes and plans by a teacher, thought videos by a generator."""
