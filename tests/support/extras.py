"""The environment of `make extras`: the product's packages, s3fs, an S3 server and the schemas of Kubernetes."""

from tests.support.paths import ROOT

PYTHON = ROOT / ".venv-extras" / "bin" / "python"
