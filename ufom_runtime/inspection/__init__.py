"""What is looked at so that no number is silently wrong: a problem at its first use, a result that is not finite."""
