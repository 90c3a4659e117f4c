"""What doctests share with the tests: a message is compared without JAX's note on hidden frames."""

import jax

jax.config.update("jax_traceback_filtering", "off")
