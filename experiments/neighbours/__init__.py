"""What others do to make a model safer, or keep it so: a file a method, the shortest fork each."""
