"""What an adapter has learned, in words, figures and one page."""
