"""Code that is compiled on the user's machine where it can be; everything works, more slowly, without it."""
