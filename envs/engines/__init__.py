"""The physics engines, and the functions that make MJX agree with C MuJoCo."""
