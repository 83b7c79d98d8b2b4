"Every setting is in settings.ini: change it there, not here"
from configparser import ConfigParser
from pathlib import Path
from shutil import copyfile, rmtree

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_path']
jupyter = cfg['jupyter_requirements'].split()


class WithTutorials(build_py):
    "The wheel has the tutorials of its version, for `w2s notebooks`; a clone has them where they are written"
    def run(self):
        super().run()
        rmtree(Path(self.build_lib)/lib/'tutorials', ignore_errors=True) # of an earlier build
        if not self.editable_mode:
            for page, copy in self.tutorials().items():
                self.mkpath(str(Path(copy).parent))
                copyfile(page, copy)

    def tutorials(self):
        "Page -> its copy in the wheel"
        return {str(p): str(Path(self.build_lib)/lib/'tutorials'/p.name) for p in sorted(Path('nbs/tutorials').glob('*.ipynb'))}

    def get_outputs(self, include_bytecode=1): return super().get_outputs(include_bytecode) + list(self.tutorials().values())

    def get_source_files(self): return super().get_source_files() + list(self.tutorials())


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=['Programming Language :: Python :: 3', 'Intended Audience :: Science/Research'],
    packages=find_packages(include=[lib, f'{lib}.*']), include_package_data=True, package_data={lib: ['py.typed', 'models/ladder/*/*']},
    cmdclass=dict(build_py=WithTutorials),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require=dict(jupyter=jupyter, ray=cfg['ray_requirements'].split(), trl=cfg['trl_requirements'].split(),
                        vllm=cfg['vllm_requirements'].split(), dev=cfg['dev_requirements'].split() + jupyter),
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f'{lib}={lib}._modidx:d']),
)
