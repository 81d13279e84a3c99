"""The old place of `jpeft.training.checkpoints`, kept for one release."""

from jpeft.training import fingerprint, load_theta, save_theta

__all__ = ['fingerprint', 'load_theta', 'save_theta']
