"""Side networks, behind stop_gradient."""
