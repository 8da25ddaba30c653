"""A 3D scene from a clip: camera poses, deformable Gaussians, renderings, and what they are worth."""
