"""What is cut from an image, and what hides the shortcuts in it."""
