from aif.cli.verbs import main

main()
