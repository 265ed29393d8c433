"""The bundled tiny models, the scenes they learned from and the oracles that measure scenes."""
