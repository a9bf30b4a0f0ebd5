"""Install commands for optional dependencies, as error messages show them."""


def install_command(extra: str) -> str:
    """The command that adds an extra's libraries to an environment that has the package.

    pip reads the names of the libraries from the installed package, so the command works however
    the package was installed; no index has to have it.
    """
    return f'pip install "peft-fsrl[{extra}]"'
