"Every setting is in settings.ini: change it there, not here"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_path']
jupyter = cfg['jupyter_requirements'].split()

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=['Programming Language :: Python :: 3', 'Intended Audience :: Science/Research'],
    packages=find_packages(include=[lib, f'{lib}.*']), include_package_data=True, package_data={lib: ['py.typed', 'models/ladder/*/*']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require=dict(jupyter=jupyter, ray=cfg['ray_requirements'].split(), trl=cfg['trl_requirements'].split(),
                        dev=cfg['dev_requirements'].split() + jupyter),
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f'{lib}={lib}._modidx:d']),
)
