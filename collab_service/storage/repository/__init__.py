"""Every SQL statement, a function each. They take a connection, return model values, and never commit."""
