"""All of the package's description stands in pyproject.toml; here is only what that cannot say.

The configs lie at the top of the repository, where a reader looks for them. A wheel has nothing beside its packages, so
there they lie in `ftwt_jax/configs/`.
"""

import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies `configs/` into the package that is built; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = pathlib.Path(self.build_lib) / "ftwt_jax" / "configs"
        self.mkpath(str(target))
        for config in sorted(pathlib.Path(__file__).parent.glob("configs/*.py")):
            self.copy_file(str(config), str(target / config.name))


setup(cmdclass={"build_py": BuildWithConfigs})
