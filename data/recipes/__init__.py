"""How datasets are made: one module of recipes per family of tasks, and the library of all recipes."""
