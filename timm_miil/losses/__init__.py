"""Losses: pure functions of tensors, and the modules that hold their settings."""
from timm_miil.losses.asymmetric import AsymmetricLoss, asymmetric_loss

__all__ = ['AsymmetricLoss', 'asymmetric_loss']
