"""The bundled demo: three toy skills, three tiny sources, two reward models as judges, and a verifier as the third judge."""
