"""Parts of bodies that several doors share (request speed)."""
