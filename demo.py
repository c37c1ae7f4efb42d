"""Draw a digit in the browser and see what a trained network predicts.

python demo.py                           # all runs, latest first, and results/tiny.pt
python demo.py runs/default --port 8080
"""

import sys
import threading
import webbrowser
from ipaddress import IPv4Address

from training.console import Number, Parser, exit_status, log, path, warn


def parse_args(argv):
    parser = Parser(prog="demo.py", description=__doc__)
    flag = parser.add_argument
    text = "run directory or checkpoint (default: the latest, without dry runs)"
    flag("run", nargs="?", type=path, help=text)
    flag("--port", type=Number(int, 1024, 65535), default=0, help="default: a free one")
    text = "IPv4 address to serve on, for a phone or a container; 0.0.0.0: all of this computer's"
    flag("--host", type=IPv4Address, default="127.0.0.1", metavar="ADDRESS", help=text)
    flag("--no-browser", action="store_true", help="only print the URL")
    return parser.parse_args(argv)


@exit_status
def main(argv):
    """Serve the page until Ctrl-C."""
    args = parse_args(argv)
    from handwriting.server import Server, load_networks  # imports torch, too slow for --help

    with Server(load_networks(args.run), args.port, str(args.host)) as server:
        if not args.host.is_loopback:
            warn("warning: everyone in this network can use the page, at a numeric address of this")
            warn("computer; what they draw travels unencrypted")
        log(f"{server.networks[0].texts['name']}: {server.url} (Ctrl-C to stop)")
        if not args.no_browser:  # in a thread, because a browser in the terminal blocks
            threading.Thread(target=webbrowser.open, args=[server.url], daemon=True).start()
        server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
