"""What a cluster, or `serve run` of a config file, needs in its environment before it starts.

source <(python -m serve.environment)
"""

import os
import shlex

from cluster import connect, ingress


def main() -> None:
    ingress.prepare_environment()
    for name in (*connect.ENVIRONMENT, *ingress.ENVIRONMENT):
        print(f"export {name}={shlex.quote(os.environ[name])}")


if __name__ == "__main__":
    main()
