"""What runs the cells of a study and keeps what came of them."""
