"""All of relloc is imported with the shapes in its annotations checked at run time."""

from jaxtyping import install_import_hook

install_import_hook("relloc", "checked.check")
