{{- define "ashlar.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* labels of one component: dict "root" $ "component" NAME */}}
{{- define "ashlar.selector" -}}
app.kubernetes.io/name: ashlar
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "ashlar.labels" -}}
{{ include "ashlar.selector" . }}
app.kubernetes.io/part-of: ashlar
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end }}

{{/* what the pods of all three DaemonSets have in common */}}
{{- define "ashlar.placement" -}}
priorityClassName: {{ .Values.priorityClassName }}
nodeSelector: {{- toYaml .Values.nodeSelector | nindent 2 }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
tolerations: {{- toYaml .Values.tolerations | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* containers that need nothing of the host but a socket in a directory */}}
{{- define "ashlar.unprivileged" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* the API server's address is in every pod; only these containers get a token */}}
{{- define "ashlar.tokenMount" -}}
- {name: api-access, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
{{- end }}

{{- define "ashlar.tokenVolume" -}}
- name: api-access
  projected:
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3607}
      - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
      - downwardAPI: {items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]}
{{- end }}
