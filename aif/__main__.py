from aif.cli import main

main()
