"""The interface that every evaluation implements, and the runner that shares features among them."""
