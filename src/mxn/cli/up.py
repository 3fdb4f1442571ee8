"""`mxn up --ray`: makes this machine a Ray cluster and serves on it, or a node of a cluster that there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mxn.config.deployments import DeploymentsFile


def up(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL | mxn.yaml]", help="What to serve. Default: smollm2-135m-instruct."),
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Through Ray Serve; needs mxn[ray].")] = False,
    join: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve nothing, be a node of the cluster with this head.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address that gateways listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port that gateways listen on. Default: 8000.", min=1, max=65535)
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Backend, where a model is named and no file.")] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON when ready, instead of text.")
    ] = False,
) -> None:
    """Start Ray on this machine and serve on it.

    The machine's chips are Ray's resources. Ray asks for a token and listens on the loopback address, its dashboard
    too. Ctrl-C drains and ends all of it.
    """
    from mxn.cli.logs import set_up_logging
    from mxn.cli.ray_serving import require_ray, serve_on_ray
    from mxn.cli.serve import file_for, server_settings
    from mxn.config.chip_card import load_chip_cards
    from mxn.errors import ConfigError
    from mxn.fleet.ray_inventory import resources_of, seen_here

    if not ray:
        raise ConfigError("mxn up needs --ray: it is the one kind of cluster that it starts; mxn serve needs none")
    require_ray()
    set_up_logging()
    from mxn.fleet.launchers.ray.node import RayNode

    if join is not None:
        if model is not None:
            raise ConfigError("--join serves nothing; name the model or file where the cluster's head is")
        with RayNode.joining(join, resources_of(seen_here(), load_chip_cards())) as node:
            raise typer.Exit(node.wait())
    file = file_for(model, {"backend": backend})
    settings = server_settings(file, [])
    cards = {**load_chip_cards(), **{card.id: card for card in file.cluster.chips}}
    with RayNode.head(resources_of(seen_here(), cards, simulated=_wants_simulated(file))) as node:
        where = (host or file.server.host, file.server.port if port is None else port)
        raise typer.Exit(serve_on_ray(file, settings, where, node.address, json_output=json_output))


def _wants_simulated(file: DeploymentsFile) -> bool:
    return any(deployment.backend == "fake" for deployment in file.deployments)
