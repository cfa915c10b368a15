{{/* The image of one program. */}}
{{- define "weft.image" -}}
{{- $r := .root.Values.image -}}
{{- if not $r.registry -}}
{{- fail "image.registry is not set: say where the images weft-control, weft-node, ztunnel and waypoint are pulled from, for example --image-registry registry.example.com/weft" -}}
{{- end -}}
{{ $r.registry }}/{{ .name }}:{{ $r.tag | default .root.Chart.AppVersion }}
{{- end -}}

{{/* Labels of every object; the argument has root and name. */}}
{{- define "weft.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/part-of: weft
app.kubernetes.io/managed-by: {{ .root.Release.Service | lower }}
app.kubernetes.io/version: {{ .root.Values.image.tag | default .root.Chart.AppVersion | quote }}
{{- end -}}

{{/* Who a pod is, for the environment of its containers. */}}
{{- define "weft.identity" -}}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: INSTANCE_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
- {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
{{- end -}}
