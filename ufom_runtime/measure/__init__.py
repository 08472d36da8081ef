"""What is measured of a problem: moments, assumption constants, seconds and bytes."""
