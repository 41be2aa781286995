"""relloc: learn to see by telling where one patch lies relative to another, and measure what was learned."""
