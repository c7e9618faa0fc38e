"""How this suite is put into a front end's folder and taken out again. Needs only Python's standard library."""
