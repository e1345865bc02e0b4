"""What two processes say to each other: strict, versioned, size-capped. Unknown, missing or odd is `Malformed`."""
