"""The interface of all evaluations, and the runner that shares features among them."""
