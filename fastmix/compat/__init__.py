"""Stand-ins for names of other libraries: each module imports the library whose names it has, and nothing imports it but you."""
