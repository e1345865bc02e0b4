#!/usr/bin/env bash
# Renews the modules in this folder from CometBFT's own .proto files: ./dev proto
# usage: generate.sh PYTHON MODULE-DIRECTORY [OUTPUT-DIRECTORY]   (the directory of github.com/cometbft/cometbft@v0.38.x)
# Imports are renamed into our package, and gogoproto's annotations, which say how Go structs look, are taken out: neither
# changes a byte on the wire.
set -euo pipefail
python=$1 module=$2
here=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
output=${3:-$here}
package=moorline/ledger/engines/cometbft/proto
files=(abci/types crypto/keys crypto/proof privval/types types/params types/types types/validator version/types)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/$package"
for file in "${files[@]}"; do
  # 1. our imports; 2. no gogoproto; 3. no Go package; 4. field options that were gogoproto's alone; 5. no gRPC service
  perl -0pe '
    s{import "tendermint/(\w+)/(\w+)\.proto"}{import "'"$package"'/$1_$2.proto"}g;
    s{^import "gogoproto/gogo\.proto";\n}{}mg;
    s{^option go_package.*\n}{}mg;
    s{^\s*option \(gogoproto\.[^;]*;\n}{}mg;
    s{\s*\[(?:\s*\(gogoproto\.\w+\)\s*=\s*(?:"[^"]*"|\w+)\s*,?)+\s*\]}{}gs;
    s{\(gogoproto\.\w+\)\s*=\s*(?:"[^"]*"|\w+)\s*,?\s*}{}gs;
    s{^service \w+ \{.*?^\}\n}{}msg;
  ' "$module/proto/tendermint/$file.proto" >"$work/$package/${file/\//_}.proto"
done
(cd "$work" && "$python" -m grpc_tools.protoc -I. --python_out=. --pyi_out=. "$package"/*.proto)
for made in "$work/$package"/*_pb2.py "$work/$package"/*_pb2.pyi; do
  cp "$made" "$output/$(basename "$made")"
done
