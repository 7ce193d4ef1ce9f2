#!/bin/bash
# render.sh [FILE [OPTIONS]] -- write deploy/ashlar.yaml (or FILE) from the chart, with
# helm and OPTIONS of it. The command is $HELM, by default the version that the Makefile
# names.
#
# The sum in the first lines is of all files of the chart: a test of test/kube compares it,
# so that a chart that was changed and not rendered is found without helm.
set -eu
cd "$(dirname "$0")"
: "${HELM:=go run helm.sh/helm/v3/cmd/helm@v3.22.0}"
output=${1:-ashlar.yaml}
shift || true
sum=$(cd helm/ashlar && find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d ' ' -f 1)
text=$($HELM template ashlar helm/ashlar --namespace ashlar-system --kube-version 1.36.3 --set namespace.create=true "$@")
{
  echo "# Ashlar on Kubernetes: kubectl apply -f ashlar.yaml. What it needs: docs/kubernetes.md."
  echo "# Rendered from deploy/helm/ashlar by \`make manifest\`; change the chart, not this file."
  echo "# chart $sum"
  # Comments of Helm's, the same in each object, say nothing to a reader.
  grep -v '^# Source: ' <<<"$text"
} >"$output.new"
mv "$output.new" "$output"
