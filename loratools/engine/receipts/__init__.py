"""The receipt of a merge: what it says, how it is written and opened, and the base that comes out of it."""
