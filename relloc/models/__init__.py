"""Backbone networks, and the heads that classify where one patch lies relative to another."""
