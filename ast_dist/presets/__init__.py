"""Named settings, one YAML file each; `--preset NAME` reads them through importlib.resources."""
