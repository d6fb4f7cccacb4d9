"""The bundled demo: toy skills, three tiny sources, two judges and a verifier."""
