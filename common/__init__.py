"""What the three stages share, one subject a file."""
