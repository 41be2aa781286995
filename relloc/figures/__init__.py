"""How figures look: one style for the pictures of studies, evaluations, reports and notebooks."""
