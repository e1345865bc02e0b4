"""Inside the function: attests, proves the launch token, serves the identity to the function."""
