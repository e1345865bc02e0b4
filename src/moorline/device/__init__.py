"""A user's device: enrolment over EST and connection to a function."""
