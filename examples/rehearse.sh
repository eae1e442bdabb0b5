#!/usr/bin/env bash
# A launch over three nodes on this machine, with a stand-in for the engine: start, look, ask, stop.
set -euo pipefail
export XDG_STATE_HOME=$(mktemp -d)
trap 'glmplan stop demo --forget || true; rm -rf "$XDG_STATE_HOME"' EXIT
glmplan launch --rehearse --yes --name demo --http-port 31000 --rendezvous-port 21000 --hosts local#0-7,local#8-15,local#16-23
glmplan status demo
glmplan logs demo --node 1 --lines 3
glmplan verify --url http://127.0.0.1:31000 --only arithmetic
