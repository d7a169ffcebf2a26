"""Images and videos in verl."""
