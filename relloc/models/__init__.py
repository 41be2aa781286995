"""Backbones, and the head that answers where one patch lies relative to another."""
