"""Ray marching: radiance fields to pictures."""
