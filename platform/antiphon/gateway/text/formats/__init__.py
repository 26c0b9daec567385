"""How model families write calls and thoughts, one small file each; ``registry`` has them all (request speed)."""
